"""What a key service is: the contract, its data, and how a backend is found."""
