"""The native ops of csrc/, each with a reference in plain torch."""
