"""One file for each op: its checks, its autograd.Function, its library ops for torch.compile, its public function."""
