"""Bytes in and out: data sets, images, class lists and shards. Knows neither Ray nor models."""
