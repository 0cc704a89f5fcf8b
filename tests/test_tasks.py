import pytest

from rwkv_speech import tasks
from rwkv_speech.errors import UserError


def test_a_known_task_is_the_tables():
    assert tasks.task_named(tasks.DEFAULT) is tasks.KNOWN["asr"]


def test_a_new_name_is_a_task_like_speech_recognition():
    assert tasks.task_named("st_de") == tasks.Task("st_de", tasks.KNOWN["asr"].prompt)


@pytest.mark.parametrize("name", ["", "ASR", "1st", "a-b", "a.b", "a/b", "ü"])
def test_what_is_no_name_is_an_error(name: str):
    with pytest.raises(UserError, match=f"task '{name}': expected a name of lower-case letters"):
        tasks.task_named(name)
