"""The guide: pages that `clbench help TOPIC` shows, some of them made from the code."""
