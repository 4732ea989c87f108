"""What a layer is to an adapter: kernel views, products, addresses."""
