"""What a key service is: the contract, its data, and how one is found."""
