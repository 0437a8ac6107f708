"""The official ESCI release, as a miniature made here, and the joined dump."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srpo.core.grades import Grades
from srpo.core.step_presets import PAPER, StepsConfig
from srpo.data.esci import TEXT_CHARS
from srpo.data.examples import Example
from srpo.data.readers import load_examples, read_examples

SHARED = Path(os.environ.get("SRPO_SHARED_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
DUMP = SHARED / "esci_us"


def example_row(i: int, **changes) -> dict:
    return {
        "example_id": i,
        "query": f"query {i // 4}",
        "query_id": i // 4,
        "product_id": f"P{i % 5}",
        "product_locale": "us",
        "esci_label": "ESCI"[i % 4],
        "small_version": i % 2,
        "large_version": 1,
        "split": "train" if i < 8 else "test",
    } | changes


def product_row(i: int, **changes) -> dict:
    return {
        "product_id": f"P{i}",
        "product_title": f"product {i}",
        "product_description": f"<p>description&nbsp;{i} &amp; more</p>",
        "product_bullet_point": f"first {i}\n  second\n\n",
        "product_brand": "Acme",
        "product_color": "red",
        "product_locale": "us",
    } | changes


def release(folder: Path, examples: list[dict], products: list[dict], row_group_size: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in (("examples", examples), ("products", products)):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, folder / f"shopping_queries_dataset_{name}.parquet", row_group_size=row_group_size)
    return folder


def test_the_join_of_examples_and_products(tmp_path):
    path = release(tmp_path, [example_row(i) for i in range(12)], [product_row(i) for i in random.Random(0).sample(range(9), 9)])
    examples = load_examples(path, PAPER)
    assert [e.example_id for e in examples] == [str(i) for i in range(12)]
    assert examples[6] == Example(
        example_id="6",
        query_id="1",
        query="query 1",
        title="product 1",
        fields={"brand": "Acme", "color": "red", "text": "first 1 | second"},
        gold=(None, None, None, None, "L2"),
        truth=(None,) * 5,
        tags={"locale": "us", "split": "train", "grade": "L2"},
    )
    assert [e.grade for e in examples[:4]] == ["L4", "L3", "L2", "L1"]
    file = path / "shopping_queries_dataset_examples.parquet"
    assert load_examples(file, PAPER) == examples
    assert load_examples(file, PAPER, limit=2) == examples[:2]


def test_esci_on_a_scale_of_two_grades_needs_labels(tmp_path):
    path = release(tmp_path / "release", [example_row(i) for i in range(4)], [product_row(i) for i in range(5)])
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps(dump_row(i)) + "\n" for i in range(4)))
    labelled = Grades(("no", "yes"), labels={"E": "yes", "S": "yes", "C": "no", "I": "no"})
    for source in (path, tmp_path / "dump.jsonl"):
        examples = load_examples(source, StepsConfig().schema(labelled))
        assert [e.grade for e in examples] == [e.tags["grade"] for e in examples] == ["yes", "yes", "no", "no"]
        with pytest.raises(ValueError, match=r"label' is .E.: the grades are no, yes; .*give other spellings in grades\.labels"):
            load_examples(source, StepsConfig().schema(Grades(("no", "yes"))))


def test_options_behind_the_path(tmp_path):
    examples = [example_row(i) for i in range(12)]
    examples += [example_row(i, product_locale="es", query=f"consulta {i}") for i in range(12, 16)]
    products = [product_row(i) for i in range(5)] + [
        product_row(i, product_locale="es", product_title=f"producto {i}") for i in range(5)
    ]
    path = release(tmp_path, examples, products)

    def ids(options: str) -> list[int]:
        return [int(e.example_id) for e in load_examples(f"{path}{options}", PAPER)]

    assert ids("") == ids("?locale=us") == list(range(12))
    assert ids("?locale=all") == list(range(16))
    assert ids("?version=small") == [1, 3, 5, 7, 9, 11]
    assert ids("?split=test") == [8, 9, 10, 11]
    assert ids("?locale=es&version=small&split=test") == [13, 15]
    spanish = load_examples(f"{path}?locale=es", PAPER)[0]
    assert (spanish.title, spanish.query) == ("producto 2", "consulta 12")
    with pytest.raises(ValueError, match="has no examples"):
        ids("?locale=jp")
    with pytest.raises(ValueError, match="ESCI has no locale='de': use one of us, es, jp, all"):
        ids("?locale=de")
    for bad in ("?lang=us", "?", "?train"):
        with pytest.raises(ValueError, match="cannot read the options"):
            ids(bad)
    for name, twice in (("split", "?split=train&split=test"), ("locale", "?locale=us&version=small&locale=us")):
        with pytest.raises(ValueError, match=rf"the options .* give {name} more than once: keep one"):
            ids(twice)


def test_holes_in_the_product_table(tmp_path):
    products = [
        product_row(0, product_bullet_point=None),
        product_row(1, product_bullet_point=" \n ", product_description=None, product_brand=None, product_color=""),
        product_row(2, product_title=None),
        product_row(3, product_bullet_point="word " * 500, product_title="two\nlines"),
        product_row(4, product_title=None, product_bullet_point=None, product_description=None),
    ]
    examples = load_examples(release(tmp_path, [example_row(i) for i in range(5)], products), PAPER)
    assert examples[0].fields["text"] == "description 0 & more"
    assert examples[1].fields == {}
    assert examples[2].title == "first 2 | second"
    assert examples[3].title == "two | lines"
    assert 0.9 * TEXT_CHARS < len(examples[3].fields["text"]) <= TEXT_CHARS and examples[3].fields["text"].endswith("word")
    assert examples[4].title == "product P4"


def test_query_sources_are_read_where_they_are(tmp_path):
    path = release(tmp_path, [example_row(i) for i in range(8)], [product_row(i) for i in range(5)])
    sources = path / "shopping_queries_dataset_sources.csv"
    sources.write_text("query_id,source\n0,behavioral\n1,negations\n")
    assert [e.tags["query_source"] for e in load_examples(path, PAPER)] == ["behavioral"] * 4 + ["negations"] * 4
    sources.write_text("query_id,source\n0 behavioral\n")
    with pytest.raises(ValueError, match=r"sources\.csv, line 2: .*the columns query_id and source"):
        load_examples(path, PAPER)


def test_what_is_wrong_with_a_release_is_said(tmp_path):
    examples, products = [example_row(i) for i in range(8)], [product_row(i) for i in range(5)]
    path = release(tmp_path / "a", examples, products[:3])
    with pytest.raises(ValueError, match=r"examples\.parquet, row 4: product P3 \(us\) is not in .*products\.parquet"):
        load_examples(path, PAPER)
    (path / "shopping_queries_dataset_products.parquet").unlink()
    with pytest.raises(ValueError, match=r"no shopping_queries_dataset_products\*\.parquet: put the products file"):
        load_examples(path, PAPER)
    for row in products:
        del row["product_color"]
    with pytest.raises(ValueError, match="has no column 'product_color'"):
        load_examples(release(tmp_path / "b", examples, products), PAPER)
    with pytest.raises(ValueError, match="row 6: 'label' is \"X\""):
        load_examples(
            release(tmp_path / "c", [*examples[:5], example_row(5, esci_label="X")], [product_row(i) for i in range(5)]), PAPER
        )
    with pytest.raises(ValueError, match="row 9: example_id '2' occurs a second time"):
        load_examples(release(tmp_path / "d", [*examples, example_row(2)], [product_row(i) for i in range(5)]), PAPER)


def test_only_the_products_of_the_chosen_examples_are_kept(tmp_path):
    """Row numbers and joins stay right when most rows are filtered out over many record batches."""
    num = 40_000
    examples = [example_row(i, product_id=f"P{i}", split="test" if i % 1000 == 7 else "train") for i in range(num)]
    products = [product_row(i) for i in range(num) if i % 1000 == 7 and i != 37_007]
    path = release(tmp_path, examples, products, row_group_size=1000)
    stream = read_examples(f"{path}?split=test", PAPER)
    chosen = [next(stream) for _ in range(37)]
    assert [e.title for e in chosen] == [f"product {i}" for i in range(7, 37_000, 1000)]
    with pytest.raises(ValueError, match="row 37008: product P37007"):
        next(stream)


def dump_row(i: int, **changes) -> dict:
    return {
        "query_id": 7, "query": "query", "product_id": f"B{i}", "title": f"title {i}", "brand": "Acme", "color": "",
        "category": "A > B", "text": "text", "label": "ESCI"[i % 4], "grade": 3 - i % 4, "query_source": "other",
    } | changes  # fmt: skip


def test_the_dump_is_told_apart_by_its_columns(tmp_path):
    """The dump's grade is 3 to 0 and ours 4 to 1: the label decides."""
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(dump_row(i)) + "\n" for i in range(4)).encode()))
    examples = load_examples(tmp_path, PAPER)
    assert [e.grade for e in examples] == ["L4", "L3", "L2", "L1"]
    assert examples[1] == Example(
        example_id="7-B1",
        query_id="7",
        query="query",
        title="title 1",
        fields={"brand": "Acme", "category": "A > B", "text": "text"},
        gold=(None, None, None, None, "L3"),
        truth=(None,) * 5,
        tags={"query_source": "other", "grade": "L3"},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "line 1: 'label' is missing: a row of the ESCI dump has"),
        ({"label": "Q"}, "line 1: 'label' is \"Q\""),
        ({"label": ["E"]}, "line 1: 'label' is"),
        ({"grade": 2}, "line 1: grade 2 and label 'E' disagree"),
        ({"grade": True, "label": "C"}, "line 1: grade is true: write 3, 2, 1 or 0"),
        ({"brand": False}, "line 1: fields.brand is false: write it as a string"),
        ({"price": "1"}, "line 1: the ESCI dump has no column 'price'"),
        ({"title": ""}, "line 1: 'title' is \"\""),
    ],
)
def test_bad_dump_rows(tmp_path, changes, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(dump_row(0, **changes)) + "\n")
    with pytest.raises(ValueError, match=message):
        load_examples(path, PAPER)


@pytest.mark.skipif(not DUMP.is_dir(), reason=f"no ESCI dump at {DUMP}; set SRPO_SHARED_DATA to the folder that has esci_us")
def test_the_real_dump():
    examples = load_examples(DUMP, PAPER)
    assert len(examples) == 4965
    assert Counter(e.gold[-1] for e in examples) == {"L4": 2504, "L3": 1480, "L2": 251, "L1": 730}
    assert len({e.query_id for e in examples}) == 112
    assert {e.tags["query_source"] for e in examples} == {"parse_pattern", "negations", "behavioral", "other"}
    assert all(len(e.fields.get("text", "")) <= TEXT_CHARS for e in examples)


def test_a_product_that_is_there_twice(tmp_path):
    examples, products = [example_row(i) for i in range(8)], [product_row(i) for i in range(5)]
    path = release(tmp_path, examples, [*products, products[2]])
    assert len(load_examples(path, PAPER)) == 8  # the same texts: one product
    second = path / "shopping_queries_dataset_products_2.parquet"
    pq.write_table(pa.Table.from_pylist([product_row(3, product_title="another")]), second)
    with pytest.raises(ValueError, match=r"products_2\.parquet, row 1: product P3 \(us\) is there a second time"):
        load_examples(path, PAPER)


def test_titles_lose_their_markup_and_nothing_else(tmp_path):
    titles = [
        "Monitor <27 inch, 5&gt3",
        "x<br/>y &amp; z",
        "size <M or >L",
        '<p class="a>b">bold</p> <3 hearts>',
        "pen&notebook set",
    ]
    path = release(tmp_path, [example_row(i) for i in range(5)], [product_row(i, product_title=t) for i, t in enumerate(titles)])
    wanted = ["Monitor <27 inch, 5&gt3", "x y & z", "size <M or >L", "bold <3 hearts>", "pen&notebook set"]
    assert [e.title for e in load_examples(path, PAPER)] == wanted


def test_sources_are_read_by_their_header(tmp_path):
    path = release(tmp_path, [example_row(i) for i in range(8)], [product_row(i) for i in range(5)])
    sources = path / "shopping_queries_dataset_sources.csv"
    for text in (
        ",query_id,source\n0,0,behavioral\n1,1,negations\n",
        '"query_id","source"\r\n"0","behavioral"\r\n"1","negations"\r\n',
        "\ufeffsource,query_id\nbehavioral,0\nnegations,1\n",
    ):
        sources.write_text(text, encoding="utf-8")
        assert [e.tags["query_source"] for e in load_examples(path, PAPER)] == ["behavioral"] * 4 + ["negations"] * 4
    for text, message in (
        ("0,behavioral\n1,negations\n", r"sources\.csv, line 1: the header is '0,behavioral'"),
        ("query_id,source\n0,a\n0,b\n", r"sources\.csv, line 3: query 0 has a second source"),
        ("", r"sources\.csv, line 1: the header is ''"),
        ("query_id,source,source\n0,a,b\n", r"sources\.csv, line 1: the column 'source' is there twice"),
        ("query_id,source, query_id\n0,a,1\n", r"sources\.csv, line 1: the column 'query_id' is there twice"),
        ("query_id,source\n", r"sources\.csv: none of the 2 queries of the examples has a source, such as query 0"),
        ("query_id,source\n0010,a\n7,b\n", r"sources\.csv: none of the 2 queries"),
        ("query_id,source\n0, \n", r"sources\.csv, line 2: a row without"),
        ("query_id,source\n0,a\n0.0,b\n", r"sources\.csv, line 3: query 0 has a second source"),
    ):
        sources.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_examples(path, PAPER)


@pytest.mark.parametrize("text", ["query_id,source\n0.0,a\n1.0,b\n", ' query_id , source\n 0 , a\n\n"1", "b"\n'])
def test_sources_whose_ids_are_spelled_otherwise(tmp_path, text):
    path = release(tmp_path, [example_row(i) for i in range(8)], [product_row(i) for i in range(5)])
    (path / "shopping_queries_dataset_sources.CSV").write_text(text)
    assert [e.tags["query_source"] for e in load_examples(path, PAPER)] == ["a"] * 4 + ["b"] * 4
    with pytest.raises(ValueError, match="has no examples"):
        load_examples(f"{path}?locale=jp", PAPER)


def test_a_sources_file_that_is_not_read_is_refused(tmp_path):
    path = release(tmp_path, [example_row(i) for i in range(8)], [product_row(i) for i in range(5)])
    (path / "shopping_queries_dataset_sources.csv.gz").write_bytes(gzip.compress(b"query_id,source\n0,a\n1,b\n"))
    with pytest.raises(ValueError, match=r"sources\.csv\.gz: not a \.csv file, so it is not read: unpack it"):
        load_examples(path, PAPER)


def test_a_pair_without_a_label_is_refused(tmp_path):
    path = release(tmp_path, [example_row(0), example_row(1, esci_label=None)], [product_row(i) for i in range(5)])
    with pytest.raises(ValueError, match=r"examples\.parquet, row 2: esci_label is null: fetch the release again"):
        load_examples(path, PAPER)


def test_a_number_of_the_dump_is_a_text(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(dump_row(0, brand=0, color=None, category="", query_source=7, grade=3.0)) + "\n")
    (example,) = load_examples(path, PAPER)
    assert (example.fields, example.tags) == ({"brand": "0", "text": "text"}, {"query_source": "7", "grade": "L4"})
