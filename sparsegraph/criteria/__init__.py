"""Pruning criteria: which weights of one matrix go. One file each; `table` names them all."""
