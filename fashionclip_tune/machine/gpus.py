"""What NVIDIA's cards can do, by torch's names of them."""

import re
from dataclasses import dataclass

# Of a peak that a card's power does not limit, what large matrix products reach; the rest is an estimate for such cards.
_MATMUL_SHARE = 0.6


@dataclass(frozen=True)
class Gpu:
    """A card's rates, as its maker states them."""

    name: str
    tflops: float
    """Of its tensor cores in fp16 or bf16 with sums in fp32, without sparsity."""
    gb_per_second: float
    """To and from its memory."""
    matmul_share: float = _MATMUL_SHARE
    """Of ``tflops``: what matrix products reach as they follow each other."""
    bandwidth_share: float = 0.8
    """Of ``gb_per_second``: what kernels reach that do no more than read and write."""

    @property
    def with_article(self) -> str:
        return f"{'an' if self.name[0] in 'AHLR' else 'a'} {self.name}"


# Of 65 TFLOPS a T4 made 24 in products of 4,096 x 4,096 matrices: it keeps to 70 W, and so to a lower clock than its peak is
# stated for (https://forums.developer.nvidia.com/t/about-gpu-peak-performance/264462, where NVIDIA says why). An L4 keeps to
# 72 W, and is taken to fall behind as much.
_CAPPED = 24 / 65

T4 = Gpu("T4", 65, 320, _CAPPED)  # NVIDIA T4 Tensor Core GPU, datasheet, 2019

# The first whose name is in torch's.
_GPUS = (
    T4,
    Gpu("L4", 121, 300, _CAPPED),  # NVIDIA L4 Tensor Core GPU, datasheet, 2023: 242 with sparsity
    Gpu("A10G", 70, 600),  # NVIDIA A10G, datasheet, 2022
    Gpu("A10", 125, 600),  # NVIDIA A10, datasheet, 2021
    # NVIDIA A100 Tensor Core GPU, datasheet, 2021.
    Gpu("A100-SXM4-80GB", 312, 2039),
    Gpu("A100 80GB", 312, 1935),
    Gpu("A100", 312, 1555),
    # NVIDIA H100 Tensor Core GPU, datasheet, 2023; half of what is stated with sparsity.
    Gpu("H100 PCIe", 756, 2000),
    Gpu("H100 NVL", 835, 3900),
    Gpu("H100", 989, 3350),
    # NVIDIA H200 Tensor Core GPU, datasheet, 2024. Measured (results/README.md): products of 4,096 x 4,096 matrices 748 TFLOPS,
    # copies of 1 GiB 4,221 GB/s, but AdamW 2,100; with its share a step of ViT-B-32 takes 19 ms (measured: 23), and one of
    # SigLIP2 52 (measured: 62).
    Gpu("H200", 989, 4800, bandwidth_share=0.45),
    # NVIDIA Ampere GA102 GPU Architecture, white paper, 2020: 3090, 3080 and 3070. The others by their shaders' stated rate in
    # fp32, of which the tensor cores make twice as much in fp16 with sums in fp32.
    Gpu("RTX 3090 Ti", 80, 1008),
    Gpu("RTX 3090", 71, 936),
    Gpu("RTX 3080 Ti", 68, 912),
    Gpu("RTX 3080", 59.5, 760),
    Gpu("RTX 3070", 40.6, 448),
    Gpu("RTX 3060 Ti", 32.4, 448),
    Gpu("RTX 3060", 25.5, 360),
    # NVIDIA Ada GPU Architecture, white paper, 2023: 4090 and 4080. Likewise.
    Gpu("RTX 4090", 165.2, 1008),
    Gpu("RTX 4080", 97.5, 717),
    Gpu("RTX 4070 Ti", 80.2, 504),
    Gpu("RTX 4070", 58.3, 504),
    Gpu("RTX 4060 Ti", 44.1, 288),
    Gpu("RTX 4060", 30.2, 272),
)


def find_gpu(name: str) -> Gpu | None:
    """The card that torch calls so (``Tesla T4``, ``NVIDIA A100-SXM4-40GB``); None: none that is known here."""
    return next((gpu for gpu in _GPUS if re.search(rf"\b{gpu.name}\b", name)), None)
