"""Operations on frozen weights: products and row norms, each beside its plain reference."""
