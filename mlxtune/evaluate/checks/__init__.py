"""Suites of prompts, and the checks that say what is right with an answer to one."""
