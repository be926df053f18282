"""The simulator: when everything in a plan starts and ends."""
