"""Configs whose heads do not divide the hidden size."""

import pytest

from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from tests.families.test_published_configs import LLAMA2_70B
from tests.families.test_published_dialects import BAICHUAN_13B, CHATGLM_6B, INTERNLM2_7B, INTERNLM_7B


@pytest.mark.parametrize("config", [LLAMA2_70B, BAICHUAN_13B, CHATGLM_6B, INTERNLM_7B, INTERNLM2_7B])
def test_heads_that_do_not_divide_the_hidden_size_are_refused(config):
    uneven = config | {"hidden_size": config["hidden_size"] + 1}
    with pytest.raises(InputError, match="must be a multiple of num_attention_heads"):
        family_of_config(uneven).spec_from_hf(uneven)
