"""Few good rows out of many: scored, evened out over kinds of instruction, unlike one another."""
