"""Folders, manifests and shards: what is found, what is refused in one line, what is split off."""

import io
import json
import os
import pickle
import re
import tarfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.data.folder import Folder
from dalle.data.manifest import Manifest
from dalle.data.open import open_source, open_splits
from dalle.data.shards import Shards
from dalle.data.source import BadSample, Source
from dalle.errors import DataError
from tests import tiny


def png(value, width=7, height=5):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def red(sample):
    return sample.image.getpixel((0, 0))[0]


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def one_line(caught):
    return "\n" not in str(caught.value)


# Folders


def test_a_folder_is_read_recursively_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.y.PNG").write_bytes(png(2))
    (tmp_path / "b" / "x.y.txt").write_text(" a dog \n\nein Hund\na dog\n")
    (tmp_path / "a.jpg").write_bytes(png(1))
    (tmp_path / "a.txt").write_bytes("\ufeffa cat".encode())
    (tmp_path / "._a.jpg").write_bytes(b"macOS")
    folder = Folder(tmp_path)
    assert isinstance(folder, Source)
    samples = [folder[i] for i in range(len(folder))]
    assert [(s.key, red(s), s.captions) for s in samples] == [
        ("a.jpg", 1, ("a cat",)),
        ("b/x.y.PNG", 2, ("a dog", "ein Hund")),
    ]
    assert folder.captions(1) == ("a dog", "ein Hund")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no such file"), (b" \n\n", "none in it"), (b"\xff\xfe", "utf-8")]
)
def test_a_picture_without_readable_captions_is_a_bad_sample(tmp_path, content, reason):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(1))
        (tmp_path / f"{name}.txt").write_text("fine")
    (tmp_path / "b.txt").unlink()
    if content is not None:
        (tmp_path / "b.txt").write_bytes(content)
    folder = Folder(tmp_path)
    for read in (folder.__getitem__, folder.captions):
        with pytest.raises(BadSample, match=reason) as caught:
            read(1)
        assert caught.value.key == "b.png"


@pytest.mark.parametrize("suffix", [".TXT", ".Txt"])
def test_captions_may_be_in_capitals_as_pictures_may(tmp_path, suffix):
    (tmp_path / "IMG_1.JPG").write_bytes(png(1))
    (tmp_path / f"IMG_1{suffix}").write_text("one")
    assert Folder(tmp_path)[0].captions == ("one",)


def test_files_with_captions_that_are_no_pictures_we_read_are_told(tmp_path):
    for name in ("a.png", "b.heic", "c.HEIC", "d.heic", "e.json"):
        (tmp_path / name).write_bytes(png(1))
    for name in ("a.txt", "b.txt", "c.TXT", "e.txt"):
        (tmp_path / name).write_text("one")
    folder = Folder(tmp_path)
    assert folder.keys == ["a.png"]
    assert [bad.key for bad in folder.bad] == ["b.heic", "c.HEIC"]  # without captions it was not meant
    assert "save it as PNG or JPEG" in folder.bad[0].reason


def test_a_folder_of_other_files_is_refused_with_their_kinds(tmp_path):
    for name in ("a.heic", "b.HEIC", "a.txt", "LICENSE"):
        (tmp_path / name).write_text("x")
    expected = "no picture among its files (2 .heic, 1 without a suffix, 1 .txt); give pictures with a .txt"
    with pytest.raises(DataError, match=re.escape(expected)):
        Folder(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    tiny.write_folder(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    assert len(Folder(tmp_path / "data")) == len(Folder(tmp_path / "elsewhere")) == 9


def test_pictures_beside_shards_are_not_left_out_in_silence(tmp_path):
    folder = tiny.write_folder(tmp_path / "data")
    (folder / "a.tar").touch()
    with pytest.raises(DataError, match=r"9 pictures beside 1 \.tar archives; give a folder of either kind"):
        open_source(str(folder), "train", 8)


def test_pictures_in_capitals_beside_shards_are_not_left_out_either(tmp_path):
    tiny.write_tar(tmp_path / "a.tar")
    (tmp_path / "B.PNG").write_bytes(png(1))
    with pytest.raises(DataError, match=r"1 pictures beside 1 \.tar archives"):
        open_source(str(tmp_path), "train", 8)


def test_a_macs_shadows_do_not_make_a_folder_one_of_the_other_kind(tmp_path):
    tiny.write_tar(tmp_path / "shards" / "a.tar")
    (tmp_path / "shards" / "._b.png").touch()
    tiny.write_folder(tmp_path / "pictures")
    (tmp_path / "pictures" / "._a.tar").touch()
    for folder in ("shards", "pictures"):
        assert len(open_source(str(tmp_path / folder), "train", 8)) == 8


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no picture among its files \(none\); give pictures") as caught:
        open_source(str(tmp_path), "train", 8)
    assert one_line(caught)


def test_a_folder_without_captions_points_to_the_manifest_in_it(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "captions.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"1 pictures, none with captions.*captions\.jsonl"):
        Folder(tmp_path)


def test_of_several_manifests_each_is_named(tmp_path):
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(png(1))
        (tmp_path / split / "metadata.csv").write_text("file_name,text\na.png,one\n")
    with pytest.raises(DataError, match=r"may list a part: test/metadata\.csv, train/metadata\.csv$"):
        Folder(tmp_path)


def test_a_caption_ends_where_its_line_does(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_bytes("one\u2028still\r\ntwo \x0c\x85 cents\rthree".encode())
    assert Folder(tmp_path).captions(0) == ("one\u2028still", "two \x0c\x85 cents", "three")


# Manifests

TABLES = {
    "m.jsonl": '{"image": "p/1.png", "caption": "one"}\n\n'
    '{"image": "p/2.png", "caption": "two", "captions": ["two", "deux"]}\n'
    '{"image": "p/1.png", "captions": ["uno", "one"]}\n',
    "m.csv": 'image,caption,captions\np/1.png,one,\np/2.png,two,"[""two"", ""deux""]"\np/1.png,uno,\n',
    "m.tsv": 'image\tcaption\np/1.png\tone\np/2.png\t"[""two"", ""deux""]"\np/1.png\tuno\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_manifest_unites_the_captions_of_an_image(tmp_path, name):
    (tmp_path / "p").mkdir()
    for value in (1, 2):
        (tmp_path / "p" / f"{value}.png").write_bytes(png(value))
    (tmp_path / name).write_text(TABLES[name])
    manifest = Manifest(tmp_path / name)
    samples = [manifest[i] for i in range(len(manifest))]
    assert [(s.key, red(s), s.captions) for s in samples] == [
        ("p/1.png", 1, ("one", "uno")),
        ("p/2.png", 2, ("two", "deux")),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text\np/1.png,one\n"),
        ("metadata.jsonl", '{"file_name": "p/1.png", "text": "one"}\n'),
        ("metadata.jsonl", '{"file_name": "x.png", "image": "p/1.png", "text": "no", "caption": "one"}\n'),
    ],
)
def test_columns_may_be_named_as_those_of_hugging_faces_image_folders(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    manifest = Manifest(tmp_path / name)
    assert (manifest.keys, manifest.captions(0)) == (["p/1.png"], ("one",))


def test_blanks_around_the_names_of_columns_do_not_count(tmp_path):
    (tmp_path / "m.csv").write_text("image, caption \na.png,a cat\n")
    assert Manifest(tmp_path / "m.csv").captions(0) == ("a cat",)


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_manifest(tmp_path, name):
    text = "image,caption\na.png,a cat\n" if name == "m.csv" else '{"image": "a.png", "caption": "a cat"}\n'
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert Manifest(tmp_path / name).captions(0) == ("a cat",)


@pytest.mark.parametrize("caption", ["[sic] a cat", "[2020]", "[[]]"])
def test_a_caption_in_brackets_is_a_caption(tmp_path, caption):
    (tmp_path / "m.csv").write_text(f"image,caption\na.png,{caption}\n")
    assert Manifest(tmp_path / "m.csv").captions(0) == (caption,)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"image": "a", "caption": "b"}\n{"image": \n', "line 2: broken JSON"),
        ("m.jsonl", '{"image": "a", "caption": "b"}\n\n{"image": "a"}\n', "line 3: columns image; expected"),
        ("m.jsonl", '["a", "b"]\n', "line 1: .* is not an object"),
        ("m.jsonl", '{"image": "a", "caption": 7}\n', "line 1: `caption` is 7"),
        ("m.jsonl", "\n", "no rows"),
        ("m.csv", "", "no rows"),
        ("m.csv", "image,caption\n", "no rows"),
        ("m.csv", "file,caption\na,b\n", "line 2: columns file, caption; expected a path in `image`"),
        ("m.csv", "image,words\na,b\n", "line 2: columns image, words; expected"),
        ("m.csv", "image,caption\na,b\nc,red, green\n", "line 3: more values than columns"),
        ("m.csv", 'image,caption\na,"b\nc,d\n', "line 3: unexpected end of data"),
        ("m.tsv", 'image\tcaption\na\t"b" c\n', "line 2: "),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_refused_with_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        open_source(str(tmp_path / name), "train", 8)
    assert one_line(caught)
    assert str(tmp_path / name) in str(caught.value)


def test_a_manifest_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "m.csv").write_bytes("image,caption\na,é\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        Manifest(tmp_path / "m.csv")


def test_a_missing_picture_or_caption_is_a_bad_sample(tmp_path):
    (tmp_path / "m.csv").write_text("image,caption\na.png,a cat\nb.png,\n")
    manifest = Manifest(tmp_path / "m.csv")
    with pytest.raises(BadSample, match=r"^a\.png: no such file"):
        manifest[0]
    with pytest.raises(BadSample, match=r"^b\.png: no caption"):
        manifest[1]


# Shards


def test_shards_pair_members_of_the_same_stem(tmp_path):
    path = tar(
        tmp_path / "0.tar",
        {
            "a.txt": b"one\nuno",
            "d/b.v1.json": json.dumps({"caption": "two", "captions": ["deux"]}).encode(),
            "a.png": png(1),
            "a.json": b'{"caption": "not this"}',
            "d/b.v1.jpg": png(2),
            "._a.png": b"macOS",
            f"{'c' * 120}.PNG": png(3),  # a name beyond the header's 100 bytes
            f"{'c' * 120}.txt": b"three",
            "e.png": png(4),
            "f.png": b"broken",
            "f.txt": b"six",
        },
    )
    shards = Shards(path)
    samples = [shards[i] for i in range(3)]
    assert [(s.key, red(s), s.captions) for s in samples] == [
        ("0.tar/a.png", 1, ("one", "uno")),
        ("0.tar/d/b.v1.jpg", 2, ("two", "deux")),
        (f"0.tar/{'c' * 120}.PNG", 3, ("three",)),
    ]
    for index, reason in (
        (3, r"^0\.tar/e\.png: neither a \.txt nor a \.json"),
        (4, r"^0\.tar/f\.png: not a picture"),
    ):
        with pytest.raises(BadSample, match=reason):
            shards[index]
    assert shards.bad == []
    copy = pickle.loads(pickle.dumps(shards))
    assert red(copy[1]) == 2


@pytest.mark.parametrize(
    "pattern", ["{000..011}.tar", "0{00,01,02,03,04,05,06,07,08,09,10,11}.tar", "*.tar", "."]
)
def test_many_shards_are_named_by_pattern_glob_or_folder(tmp_path, pattern):
    for number in range(12):
        tar(tmp_path / f"{number:03}.tar", {"a.png": png(number), "a.txt": b"x"})
    (tmp_path / "notes.txt").write_text("no tar")
    data = str(tmp_path / pattern)
    train, heldout = (open_source(data, split, 8, heldout=0.3) for split in ("train", "heldout"))
    assert sorted(red(source[i]) for source in (train, heldout) for i in range(len(source))) == list(
        range(12)
    )


def test_a_range_that_counts_backwards_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"\{5\.\.1\} counts backwards"):
        Shards(str(tmp_path / "x{5..1}.tar"))


def test_a_macs_shadow_of_a_shard_is_no_shard(tmp_path):
    tiny.write_tar(tmp_path / "a.tar")
    (tmp_path / "._a.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    assert len(Shards(str(tmp_path))) == 9


def test_a_path_that_no_file_can_have_is_a_bad_sample(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"image": "a\\u0000.png", "caption": "x"}\n')
    with pytest.raises(BadSample, match="null"):
        Manifest(tmp_path / "m.jsonl")[0]


def test_a_missing_shard_is_named(tmp_path):
    for number in (0, 2):
        tar(tmp_path / f"{number}.tar", {"a.png": png(number), "a.txt": b"x"})
    with pytest.raises(DataError, match=r"the shard .*/1\.tar is missing") as caught:
        open_source(str(tmp_path / "{0..2}.tar"), "train", 8)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("size", "pictures"),
    [(2048, 1), (2048 + 30, 1), (3072, 1), (3584 + 20, 1), (3584 + 400, 2), (4096, 2)],
    ids=["whole file", "header", "next file", "data", "padding", "end mark"],
)
def test_a_truncated_shard_is_used_as_far_as_it_goes(tmp_path, size, pictures):
    path = tmp_path / "0.tar"
    tar(path, {"a.png": png(1), "a.txt": b"one", "b.txt": b"two", "b.png": png(2)})  # 1024 bytes each
    path.write_bytes(path.read_bytes()[:size])
    shards = Shards(str(path))
    assert [red(shards[i]) for i in range(len(shards))] == [1, 2][:pictures]
    assert [bad.key for bad in shards.bad] == ["0.tar"]
    assert "lost" in shards.bad[0].reason


def test_a_damaged_header_is_told(tmp_path):
    path = tmp_path / "0.tar"
    tar(path, {"a.png": png(1), "a.txt": b"one", "b.png": png(2)})
    content = bytearray(path.read_bytes())
    content[2048] ^= 255
    path.write_bytes(content)
    shards = Shards(str(path))
    assert shards.keys == ["0.tar/a.png"]
    assert [str(bad) for bad in shards.bad] == ["0.tar: damaged at byte 2,048; what follows is lost"]


def test_what_follows_the_end_of_a_shard_is_told(tmp_path):
    """`cat a.tar b.tar > ab.tar` makes a file of which readers see the first half."""
    parts = [Path(tar(tmp_path / f"{i}", {f"{i}.png": png(i), f"{i}.txt": b"x"})) for i in (1, 2)]
    path = tmp_path / "both.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    shards = Shards(str(path))
    assert shards.keys == ["both.tar/1.png"]
    assert [str(bad) for bad in shards.bad] == [
        "both.tar: goes on behind its end at byte 2,048; what follows is lost, unpack it"
    ]


def test_pictures_that_are_links_are_told(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.png", png(1)), ("a.txt", b"x")):
            (tmp_path / name).write_bytes(content)
            archive.add(tmp_path / name, name)
        for name, kind in (("b.png", tarfile.LNKTYPE), ("c.jpg", tarfile.SYMTYPE), ("d.md", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.png"
            archive.addfile(link)
    shards = Shards(str(path))
    assert shards.keys == ["0.tar/a.png"]
    (bad,) = shards.bad
    assert bad.reason == "2 pictures are links, which are not followed; pack the files"


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "0.tar").write_text("<html>" * 999)
    with pytest.raises(DataError, match=r"0 pictures in 1 shards.*0\.tar: "):
        Shards(str(tmp_path / "0.tar"))


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz"])
def test_a_compressed_shard_is_refused_with_what_to_do(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz"):
        pass
    with pytest.raises(DataError, match=rf"{re.escape(name)}: compressed.*gunzip it first"):
        open_source(str(tmp_path / name), "train", 8)


# Opening and splitting


@pytest.mark.parametrize(
    ("data", "message"),
    [("nowhere", "does not exist"), ("m.jsonl", "does not exist"), ("a.xlsx", "unknown kind")],
)
def test_data_of_no_known_kind_is_refused_with_what_is_known(tmp_path, data, message):
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(
        DataError, match=rf"{data}: .*{message}; give scenes, a folder .*manifest.*\.tar"
    ) as caught:
        open_source(str(tmp_path / data), "train", 8)
    assert one_line(caught)


def manifest(path, names, split=None):
    rows = [{"image": name, "caption": name} | ({"split": split[name]} if split else {}) for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def keys(source):
    return {source.captions(i)[0] for i in range(len(source))}


def test_the_split_column_decides(tmp_path):
    split = {"a": "train", "b": "test", "c": "Train", "d": "validation"}
    data = manifest(tmp_path / "m.jsonl", "abcd", split)
    assert keys(open_source(data, "train", 8)) == {"a", "c"}
    assert keys(open_source(data, "heldout", 8)) == {"b", "d"}


def test_an_image_marked_both_ways_is_not_trained_on(tmp_path):
    (tmp_path / "m.csv").write_text("image,caption,split\na,a,train\nb,b,train\na,a,test\n")
    assert keys(open_source(str(tmp_path / "m.csv"), "train", 8)) == {"b"}


def test_a_split_column_without_held_out_rows_leaves_it_to_the_hash(tmp_path):
    data = manifest(tmp_path / "m.jsonl", "abcd", dict.fromkeys("abcd", "train"))
    assert len(open_source(data, "heldout", 8)) == 1


def test_training_on_nothing_is_refused(tmp_path):
    data = manifest(tmp_path / "m.jsonl", "ab", dict.fromkeys("ab", "test"))
    with pytest.raises(DataError, match="none of 2 samples is in the train split"):
        open_source(data, "train", 8)


def test_the_hash_splits_by_key_whatever_the_order_and_the_company(tmp_path):
    names = [f"{n}.png" for n in range(2000)]
    train, heldout = (
        keys(open_source(manifest(tmp_path / "m.jsonl", names), s, 8)) for s in ("train", "heldout")
    )
    assert train | heldout == set(names)
    assert not train & heldout
    assert 20 < len(heldout) < 65  # 40 expected, standard deviation 6.3
    fewer = manifest(tmp_path / "f.jsonl", list(reversed(names[:1500])))
    assert keys(open_source(fewer, "heldout", 8)) == heldout & set(names[:1500])


def test_a_sample_keeps_its_split_for_ever(tmp_path):
    """A run that goes on with a later version must not be evaluated on what it was trained on."""
    names = [f"{n}.png" for n in range(100)]
    shares = {name: int(blake2b(name.encode(), digest_size=8).hexdigest(), 16) / 2**64 for name in names}
    expected = {name for name, share in shares.items() if share < 0.05}
    assert keys(open_source(manifest(tmp_path / "m.jsonl", names), "heldout", 8, 0.05)) == expected
    assert 1 < len(expected) < 10


def test_names_that_differ_only_in_bytes_that_are_not_utf8_are_split_apart(tmp_path):
    for n in range(32):
        name = os.fsdecode(b"%c" % (0xC0 + n))
        (tmp_path / f"{name}.png").write_bytes(png(n))
        (tmp_path / f"{name}.txt").write_text(str(n))
    assert 4 < len(open_source(str(tmp_path), "train", 8, 0.5)) < 28


def test_a_manifest_may_end_in_capitals(tmp_path):
    assert len(open_source(manifest(tmp_path / "M.JSONL", "abc"), "train", 8)) == 2


@pytest.mark.parametrize("name", ["photos.tar.d", "{a,b}", "{0..1}.tar"])
def test_a_path_that_exists_means_itself(tmp_path, name):
    """However much its name looks like an archive's or a pattern."""
    folder = tiny.write_folder(tmp_path / name)
    assert len(open_source(str(folder), "train", 8)) == 8
    shards = tmp_path / name / "in"
    shards.mkdir()
    tar(shards / "{0,1}.tar", {f"{n}.{kind}": png(n) for n in range(2) for kind in ("png", "txt")})
    assert len(open_source(str(shards / "{0,1}.tar"), "train", 8)) == 1
    data = manifest(tmp_path / "list.tar.jsonl", "abc")
    assert len(open_source(data, "train", 8)) == 2


def test_both_splits_come_of_one_look_at_the_data(tmp_path, monkeypatch):
    folder, looks = tiny.write_folder(tmp_path / "data"), []
    monkeypatch.setattr("dalle.data.open.Folder", lambda path: looks.append(path) or Folder(path))
    train, heldout = open_splits(str(folder), ("train", "heldout"), 8, 0.3)
    assert looks == [folder]
    assert sorted([*train.indices, *heldout.indices]) == list(range(9))
    assert (train.name, heldout.name) == (str(folder), f"{folder}, held out")


@pytest.mark.parametrize("heldout", [0.0, 1.0])
def test_each_split_gets_at_least_one_of_two(tmp_path, heldout):
    data = manifest(tmp_path / "m.jsonl", "ab")
    assert [len(open_source(data, split, 8, heldout)) for split in ("train", "heldout")] == [1, 1]


def test_what_a_shard_lost_is_known_to_its_splits(tmp_path):
    path = tmp_path / "0.tar"
    tar(path, {f"{n}.{kind}": png(n) if kind == "png" else b"x" for n in range(4) for kind in ("png", "txt")})
    path.write_bytes(path.read_bytes()[: 1024 * 8])
    assert [bad.key for bad in open_source(str(path), "train", 8).bad] == ["0.tar"]


def test_scenes_are_opened_by_name():
    source = open_source("scenes", "heldout", 32)
    assert source.name == "scenes"
    assert np.asarray(source[0].image).shape == (32, 32, 3)
