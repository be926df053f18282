"""`hdp doctor`: what this machine offers."""
