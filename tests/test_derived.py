"""Columns derived from a text: what they say, and that they ask nobody else."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ROOT

from qlora_core.data.derived import DERIVED, derive, reading_band
from qlora_core.errors import ConfigError

CHILD = "The cat sat on the mat. The dog ran to the cat. They like to play in the sun. It was a good day."
SCHOLAR = (
    "Notwithstanding considerable methodological heterogeneity, longitudinal investigations consistently demonstrate that "
    "socioeconomic deprivation substantially exacerbates cardiovascular vulnerability, particularly among populations whose "
    "occupational circumstances necessitate prolonged exposure to psychological adversity."
)
GREETINGS = {
    "en": "How do I reset my password, and where can I find the settings?",
    "de": "Wie setze ich mein Passwort zurück, und wo finde ich die Einstellungen?",
    "fr": "Comment réinitialiser mon mot de passe, et où se trouvent les paramètres ?",
    "es": "¿Cómo puedo cambiar mi contraseña y dónde están los ajustes de la cuenta?",
    "ru": "Как мне сбросить пароль и где находятся настройки учётной записи?",
    "zh": "如何重置我的密码，在哪里可以找到设置？",
    "ja": "パスワードをリセットするにはどうすればいいですか。",
    "ko": "비밀번호를 재설정하려면 어떻게 해야 하나요?",
    "ar": "كيف يمكنني إعادة تعيين كلمة المرور وأين أجد الإعدادات؟",
    "hi": "मैं अपना पासवर्ड कैसे बदलूं और सेटिंग्स कहाँ हैं?",
}


@pytest.mark.parametrize(("code", "text"), GREETINGS.items())
def test_language_is_told_by_two_letters(code: str, text: str) -> None:
    assert derive("language", text) == code
    assert derive("language", text * 2000) == code


@pytest.mark.parametrize("text", ["", "  \n", "123 + 4", "!?", "😀😀", "Yes", "ok", "\ud800", "xq zt wv rk"])
def test_language_of_what_does_not_tell_it_is_und(text: str) -> None:
    assert derive("language", text) == "und"


def test_reading_level_rises_with_long_words_and_sentences() -> None:
    child, scholar = derive("reading_level", CHILD), derive("reading_level", SCHOLAR)
    assert isinstance(child, float) and isinstance(scholar, float)
    assert child < 2 and reading_band(child) == "elementary"
    assert scholar > 17 and reading_band(scholar) == "graduate"


def test_reading_level_is_near_that_of_a_dictionary_of_syllables() -> None:
    """12.3 is what textstat 0.7.13 says with the CMU pronouncing dictionary, which it would have to download."""
    text = (
        "The committee will review every application during the following month. Applicants may be asked to provide additional "
        "information about their education and experience. We will notify each person of our decision by mail."
    )
    assert derive("reading_level", text) == pytest.approx(12.3, abs=1.5)


@pytest.mark.parametrize("text", ["", "12", *(text for code, text in GREETINGS.items() if code != "en")])
def test_only_english_has_a_reading_level(text: str) -> None:
    assert derive("reading_level", text) is None


def test_bands_begin_at_their_grades() -> None:
    grades = {-3.0: "elementary", 5.9: "elementary", 6.0: "middle school", 9.0: "high school", 12.9: "high school"}
    grades |= {13.0: "college", 16.9: "college", 17.0: "graduate", 40.0: "graduate"}
    assert {grade: reading_band(grade) for grade in grades} == grades
    assert reading_band(None) == "unknown"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("  - ... !", 0),
        ("It's a well-known fact: 3.14 is pi.", 7),
        ("one\ttwo\n\nthree", 3),
        ("今天天气很好。", 6),
        ("我用Python写代码", 6),
        ("मेरा नाम राम है", 4),
    ],
)
def test_words_and_characters_are_counted(text: str, words: int) -> None:
    assert derive("words", text) == words
    assert derive("characters", text) == len(text)


def test_other_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="'mood'; it must be one of language, reading_level, words, characters"):
        derive("mood", "text")


def test_threads_get_the_same_answers() -> None:
    texts = [*GREETINGS.values(), CHILD, SCHOLAR] * 10

    def columns(text: str) -> list[str | float | int | None]:
        return [derive(name, text) for name in DERIVED]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(columns, texts)) == list(map(columns, texts))


def test_nothing_is_loaded_at_import_and_nothing_is_fetched() -> None:
    """Whoever opens a connection or lets nltk download ends the process; so does a torch that a library brings along."""
    code = f"""
import socket, sys
from qlora_core.data.derived import DERIVED, derive
early = {{"numpy", "py3langid", "textstat", "nltk"}} & sys.modules.keys()
def refuse(*_, **__): raise SystemExit("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
import nltk
nltk.download = nltk.data.find = refuse
print([derive(name, {SCHOLAR!r}) for name in DERIVED][0], sorted(early), "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "en [] False\n", "")
