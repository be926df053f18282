"""Costs: the cost model, fits of measurements to it, and what is known of an H200."""
