"""Plans for other frameworks: schedulers with Megatron's and verl's interfaces."""
