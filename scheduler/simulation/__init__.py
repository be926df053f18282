"""The simulator: when each operation of a plan starts and ends."""
