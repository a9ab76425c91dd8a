"""Which positions of which axes of a model stand and fall together, and their removal.

`ties` gives every removable position of every axis a label and ties labels that must go together;
`known` finds positions that hold a constant whatever the input; `cut` removes labels from a model;
`dead` chooses what can go without changing an output; `shrink` removes on request by a criterion.
What an operator does to labels and constants is one entry of `table`.
"""
