import pytest

from rwkv_speech import tasks
from rwkv_speech.errors import UserError
from rwkv_speech.tasks import Naming, Task, state_name, task_named


def test_a_known_task_is_the_tables():
    assert task_named(tasks.DEFAULT) == tasks.KNOWN["asr"] == Task("asr", "wer")


@pytest.mark.parametrize(
    ("name", "measure"),
    [("st_fr", "bleu"), ("st_zh_cn", "bleu"), ("asr_en", "wer"), ("qa_physics", "answer"), ("emotion", "accuracy")],
)
def test_a_state_of_a_known_task_is_measured_as_that_is(name: str, measure: str):
    assert (task_named(name).name, task_named(name).measure) == (name, measure)
    assert tasks.base_of(name) == name.split("_")[0]


def test_a_new_name_is_a_task_like_speech_recognition():
    assert task_named("caption_de") == Task("caption_de", tasks.KNOWN["asr"].measure)
    assert tasks.base_of("caption_de") == "caption_de"


@pytest.mark.parametrize("name", ["", "ASR", "1st", "a-b", "a.b", "a/b", "ü"])
def test_what_is_no_name_is_an_error(name: str):
    with pytest.raises(UserError, match=f"task '{name}': expected a name of lower-case letters"):
        task_named(name)
    with pytest.raises(UserError, match=f"task '{name}'"):
        state_name(name, "de")


@pytest.mark.parametrize(
    ("task", "lang", "by_task", "by_lang"),
    [
        ("st", "fr", "st_fr", "st_fr"),
        ("st", "zh-CN", "st_zh_cn", "st_zh_cn"),
        ("st", None, "st", "st"),
        ("st", "--", "st", "st"),
        ("st_fr", "fr", "st_fr", "st_fr"),
        ("asr", "fr", "asr", "asr_fr"),
        ("caption", "fr", "caption", "caption_fr"),
        ("lid", "fr", "lid", "lid"),  # the name of the state would tell the answer
        ("emotion", "fr", "emotion", "emotion"),
    ],
)
def test_the_state_of_a_task_and_a_language(task: str, lang: str | None, by_task: str, by_lang: str):
    assert (state_name(task, lang), state_name(task, lang, by_lang=True)) == (by_task, by_lang)


def test_the_names_of_training():
    assert Naming("caption").state(None, "de") == "caption"
    assert Naming("caption", by_lang=True).state(None, "de") == "caption_de"
    assert Naming().state("st", "de") == "st_de"


def test_decoding_takes_the_state_of_the_language_where_there_is_one():
    naming = Naming.among(["asr", "asr_fr", "st_es"])
    found = [naming.state(*pair) for pair in ((None, None), ("asr", "fr"), ("asr", "de"), ("st", "es"))]
    assert found == ["asr", "asr_fr", "asr", "st_es"]
    assert Naming.among(["caption"]).state(None, "de") == "caption"


def test_a_forced_state_is_that_of_all():
    assert Naming.among(["asr", "st_es"], "asr").state("st", "es") == "asr"
    assert Naming.among(["st_fr", "st_es"], "st").state("asr", "es") == "st_es"


@pytest.mark.parametrize(
    ("states", "forced", "task"), [(["asr"], "st", None), (["asr"], "", "st"), (["a", "b"], "", None)]
)
def test_a_state_that_is_not_there_is_an_error(states: list[str], forced: str, task: str | None):
    missing = forced or task or "asr"
    with pytest.raises(UserError, match=f"found no state named '{missing}', expected one of {', '.join(states)}"):
        Naming.among(states, forced).state(task, None)
