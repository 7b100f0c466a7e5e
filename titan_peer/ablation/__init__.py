"""Comparing designs: plan.py says which jobs, solve.py makes them equal, run.py trains them, results.py sums them up."""
