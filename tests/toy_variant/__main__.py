"""The entry point with the toy in the registry."""

from __future__ import annotations

from megatron_lighthouse.pretrain_gpt import main
from megatron_lighthouse.variants import register
from tests.toy_variant.toy import TOY

if __name__ == "__main__":
    register(TOY)
    main()
