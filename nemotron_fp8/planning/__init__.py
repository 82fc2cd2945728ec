"""Pure decisions about every tensor of a conversion. No torch, no network."""
