"""Files and Hub datasets to batches."""
