"""`hdp profile`: measure this machine with a model and fit the planner's cost model."""
