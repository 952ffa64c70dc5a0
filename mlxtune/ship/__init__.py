"""Out of the house: merged models and exports, each compared with the model that was trained."""
