"""A file for each op: its checks, autograd.Functions, library ops for torch.compile, public function."""
