"""From the optimised graph to kernel calls: a table of operators, layouts, formats, segments."""
