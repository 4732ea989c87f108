"""The sites of adapters: kernel views, products, addresses and selection."""
