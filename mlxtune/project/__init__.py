"""A project: a folder with mlxtune.yaml, which the commands look for where they run, and `mlxtune init` writes."""
