"""The page of a run: one HTML file that shows what happened, readable without a network and without JavaScript."""
