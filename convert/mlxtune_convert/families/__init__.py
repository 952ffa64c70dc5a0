"""What is known of each model family, all of it in one place; `table` has the recipe for a new one."""
