"""Solvers of the choice problem (`choice.Instance`), one file each, on one protocol (`solver.Solver`)."""
