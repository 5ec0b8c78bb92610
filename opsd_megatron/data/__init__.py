"""Problems, prompts, their order and their packing: from files to the tensors of a micro-batch."""
