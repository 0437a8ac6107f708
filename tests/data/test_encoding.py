"""No text of the data becomes a token that speaks for the program; without such text, token ids are those of the whole text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from srpo.data.encoding import Part, adds_bos, control_ids, encode_parts, set_bos, with_bos, without_special_text
from srpo.data.examples import Example
from srpo.data.prompts import PromptForm, build_prompt
from srpo.data.tokenizer import encode, encode_prompts, load_tokenizer, train_tokenizer

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n<think>\n</think>{% endfor %}"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.:,-<>|/[]_ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def byte_level() -> Any:
    """As Qwen and Llama 3: byte-level BPE, chat tokens, and <think>, which is an added token but not a special one."""
    base: Any = train_tokenizer(["red boots for rain", "Query: x\nItem: y"] * 9, 300, ["\nItem: "])
    base.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False), AddedToken("<b>")])
    base.chat_template = CHAT
    return base


def unigram() -> Any:
    """As SentencePiece models: "</s>" is also a piece of the vocabulary, so that the model itself can make it of characters."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -9.0) for c in LETTERS), ("\u2581", -3.0), ("\u2581red", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    """As BERT: lower case, words and pieces, special tokens in brackets."""
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[PAD]",
        "red",
        "boots",
        *LETTERS.lower(),
        *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


FAMILIES = {"byte level": byte_level(), "unigram": unigram(), "word piece": word_piece()}
# Texts that only a program may write, in each family
SPECIAL = {
    "byte level": ["<|end|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "unigram": ["<s>", "</s>"],
    "word piece": ["[CLS]", "[SEP]", "[PAD]"],
}
OWN = {"byte level": "<|im_end|>", "unigram": "</s>", "word piece": "[SEP]"}
family = pytest.mark.parametrize("name", FAMILIES)
TEMPLATE = "Query: {query}\nItem: {item}\n"


@family
def test_text_of_the_data_becomes_no_special_token(name: str) -> None:
    tokenizer = FAMILIES[name]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[name]}
    assert set(ids.values()) <= control_ids(tokenizer)
    for token, token_id in ids.items():
        assert token_id in tokenizer.encode(f"red{token} boots", add_special_tokens=False)  # without the split it would
        for text in (token, f"red{token} boots", f" {token}{token} ", f"{token[:2]}{token}{token[2:]}", token * 300):
            assert control_ids(tokenizer).isdisjoint(encode(tokenizer, text)), text


def test_the_text_itself_stays() -> None:
    tokenizer = FAMILIES["byte level"]
    text = "".join(SPECIAL["byte level"]) + " red <b> boots\nItem: "
    assert tokenizer.decode(list(encode(tokenizer, text))) == text
    split = tokenizer("red <|im_end|> boots", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert encode(tokenizer, "red <|im_end|> boots") == tuple(split)


@family
def test_the_template_keeps_its_special_tokens(name: str) -> None:
    tokenizer, own = FAMILIES[name], OWN[name]
    pair = Example("e", "q", f"red{own}", f"{own} boots")
    (ids,) = encode_prompts(tokenizer, [pair], PromptForm(f"{{query}}{own}{{title}}{own}"))
    ids = tuple(i for i in ids if i != tokenizer.bos_token_id)
    assert [i for i in ids if i in control_ids(tokenizer)] == [tokenizer.convert_tokens_to_ids(own)] * 2
    assert ids[-1] == tokenizer.convert_tokens_to_ids(own)


def test_special_text_across_the_edge_of_template_and_data() -> None:
    tokenizer = FAMILIES["byte level"]
    for query, template in (("|im_end|>", "a <{query}"), ("<|im_e", "{query}nd|>"), ("im_", "<|{query}end|>")):
        (ids,) = encode_prompts(tokenizer, [Example("e", "q", query, "t")], PromptForm(template))
        assert control_ids(tokenizer).isdisjoint(ids) and tokenizer.decode(list(ids)) == template.format(query=query)


@family
@given(st.text(st.sampled_from("red bots<>|/[]\u00e9\u4e2d"), max_size=30), st.text(max_size=30))
def test_ids_of_ordinary_text_are_those_of_the_whole_text(name: str, query: str, title: str) -> None:
    tokenizer = FAMILIES[name]
    pair = Example("e", "q", query, title)
    text = build_prompt(pair, TEMPLATE)
    whole = tuple(tokenizer.encode(text, add_special_tokens=False))
    assert encode_parts(tokenizer, [Part(text)]) == whole or not control_ids(tokenizer).isdisjoint(whole)


@family
@given(st.data())
def test_no_mixture_of_special_texts_becomes_one(name: str, data: st.DataObject) -> None:
    tokenizer = FAMILIES[name]
    pieces = st.sampled_from([*SPECIAL[name], *"<|>/[]", "red", " ", "\uff1c", "im_end", "think", "SEP", "s"])
    parts = [Part("".join(data.draw(st.lists(pieces, max_size=8)))) for _ in range(3)]
    assert control_ids(tokenizer).isdisjoint(encode_parts(tokenizer, parts))


def test_a_bos_is_added_if_the_tokenizer_adds_one_by_itself() -> None:
    tokenizer, plain = FAMILIES["unigram"], FAMILIES["byte level"]
    assert adds_bos(tokenizer) and not adds_bos(plain)
    pair = Example("e", "q", "red", "boots")
    bos = tokenizer.bos_token_id
    assert [ids[0] == bos and bos not in ids[1:] for ids in encode_prompts(tokenizer, [pair], PromptForm("{query}"))] == [True]
    assert encode_prompts(tokenizer, [pair], PromptForm("<s>{query}"))[0][:2].count(bos) == 1  # the template writes it: once
    assert bos not in encode(tokenizer, "red")  # a response has none
    assert with_bos(plain, (3, 4)) == (3, 4)


def test_the_bos_of_a_run_is_kept_with_its_tokenizer(tmp_path) -> None:
    pair = Example("e", "q", "red", "boots")
    FAMILIES["unigram"].save_pretrained(tmp_path / "start")
    without = load_tokenizer(tmp_path / "start", "none")
    without.save_pretrained(tmp_path / "trained")
    for tokenizer in (without, load_tokenizer(tmp_path / "trained")):
        assert tokenizer.bos_token_id not in encode_prompts(tokenizer, [pair], PromptForm("{query}"))[0]
    again = load_tokenizer(tmp_path / "trained", "add")
    assert encode_prompts(again, [pair], PromptForm("{query}"))[0][0] == again.bos_token_id
    with pytest.raises(ValueError, match=r"policy\.bos is add"):
        set_bos(FAMILIES["word piece"], "add")


@pytest.mark.parametrize(
    "token",
    [
        *("<|im_end|>", "</s>", "<end_of_turn>", "[INST]", "[/INST]", "[|user|]", "[gMASK]", "<\uff5cUser\uff5c>"),
        *("[e~[", "]~b]", "]~!b[", "]<]image[>[", "<2fr>", "<0x0A>", "[control_8]", "[SPECIAL_12]", "[unused1]"),
        *(
            "\uff1c|im_end|\uff1e",
            "\uff1c\uff5cim_end\uff5c\uff1e",
            "\ufe64/s\ufe65",
            "\uff3bINST\uff3d",
            "[\uff29\uff2e\uff33\uff34]",
        ),
        *("\uff1c\uff53\uff1e", "\uff1c\uff0fs\uff1e", "<\U0001d42c>"),
    ],
)
def test_a_special_token_of_any_family_is_cut_for_a_server(token: str) -> None:
    sent = without_special_text(f"red {token}boots{token}")
    assert sent == f"red {token[0]} {token[1:]}boots{token[0]} {token[1:]}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Monitor <27 inch, >=144 Hz",
        "a < b > c",
        "I <3 boots",
        "[2 pack] boots [Red]",
        "[10] a~b [c]",
        "2~3 [a~b",
        "\uff1c5kg \ufb01ne",
    ],
)
def test_ordinary_text_is_sent_as_it_is(text: str) -> None:
    assert without_special_text(text) == text
