"""Raw data -> scenarios: data sets, class orders, manifests and the generators that write them, batched images."""
