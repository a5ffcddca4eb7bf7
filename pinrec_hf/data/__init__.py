"""Data: the contract, `prepare`, and loaders of public sets. Import the module you need."""
