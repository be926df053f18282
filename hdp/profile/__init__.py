"""`hdp profile`: measure this machine with a model, fit the cost model that the planner takes."""
