"""Five lines for a report to torch: on x86-64 without AVX-512 this backward writes outside its memory.

    ONEDNN_MAX_CPU_ISA=AVX2 python tests/onednn_convolution.py

Seen with torch 2.13.0 and 2.15.0. The loop is there because not every such write is noticed at once.
"""

import torch

torch.set_num_threads(1)
conv = torch.nn.Conv2d(4, 8, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
x = torch.randn(128, 4, 28, 28).to(memory_format=torch.channels_last)
for _ in range(20):
    conv(x).sum().backward()
print("survived")
