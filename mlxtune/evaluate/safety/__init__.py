"""What the shipped suite `safety` shows beyond its checks: by pairs, by the way a request is reworded, toxicity."""
