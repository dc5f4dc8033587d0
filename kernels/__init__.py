"""Packed +-1 matrix products: file layout and backends. Knows arrays only."""
