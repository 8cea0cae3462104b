"""Music Arena's battles as rows: preference, listening time, feedback."""

import json
import math

import pytest

from diffalign.data.music_arena import Heard, read_votes
from diffalign.errors import DataError

BATTLE = {
    "battle_uuid": "0031", "date": "2025-07-29T00:16:19.799690-04:00", "prompt": " slow piano", "is_instrumental": True,
    "is_prebaked": False, "user_pseudonym": "ab12", "audio_a": "audio/0031_a.mp3", "system_a": "one",
    "audio_b": "audio/0031_b.mp3", "system_b": "two", "preference": "A", "total_listening_time_a": 12.5,
    "total_listening_time_b": 7.0, "feedback": "B is muddy ", "timestamp": 1753762579.8, "lyrics": "",
    "duration_a": 30.0, "duration_b": 29.5, "sample_rate_a": 44100,
    "listen_data_a": '[["PLAY", 1.0], ["TICK", 2.5], ["PAUSE", 3.0]]', "listen_data_b": None}


def release(folder, *changes):
    """A release of one file a battle."""
    for number, change in enumerate(changes):
        file = folder / "battle_data" / "01" / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**BATTLE, **change}))
    return folder


def test_a_battle(tmp_path):
    vote, = read_votes(release(tmp_path, {}), Heard())
    row, = vote.rows
    assert (row.prompt, row.utility, row.soft) == ("slow piano", (1.0, 0.0), None)
    assert (row.models, row.user) == (("one", "two"), "ab12")
    assert [image.path for image in row.images] == [tmp_path / "audio" / f"0031_{side}.mp3" for side in "ab"]
    assert vote.listened == (12.5, 7.0) and vote.feedback == "B is muddy" and vote.instrumental
    assert vote.events == ((("PLAY", 1.0), ("TICK", 2.5), ("PAUSE", 3.0)), ()) and vote.durations == (30.0, 29.5)


def test_what_each_preference_becomes(tmp_path):
    votes = [*read_votes(release(tmp_path, *({"preference": said} for said in ("A", "B", "TIE", "BOTH_BAD"))), Heard())]
    assert [[row.utility for row in vote.rows] for vote in votes] == [
        [(1.0, 0.0)], [(0.0, 1.0)], [(0.5, 0.5)], [(-1.0,), (-1.0,)]]
    assert [vote.rows[0].tie for vote in votes] == [False, False, True, False] and votes[2].rows[0].soft == 0.5
    ids = [row.id for vote in votes for row in vote.rows]
    assert len(set(ids)) == len(ids)


def test_short_listening_and_withheld_clips_are_counted(tmp_path):
    folder = release(tmp_path, {}, {"total_listening_time_b": 4.9}, {"audio_a": ""}, {"total_listening_time_a": None})
    heard = Heard()
    assert len([*read_votes(folder, heard)]) == 1
    assert (heard.votes, heard.short, heard.withheld) == (4, 2, 1)
    assert len([*read_votes(folder, Heard(), least=0)]) == 3


def test_lines(tmp_path):
    (tmp_path / "battles.jsonl").write_text("".join(json.dumps({**BATTLE, "prompt": text}) + "\n" for text in "ab"))
    assert [vote.rows[0].prompt for vote in read_votes(tmp_path / "battles.jsonl", Heard())] == ["a", "b"]


@pytest.mark.parametrize("change, match", [
    ({"preference": "C"}, "0.json: preference is 'C'; one of A, B, TIE"),
    ({"prompt": None}, "0.json: prompt is missing or no text"),
    ({"total_listening_time_a": -1}, "total_listening_time_a must be seconds"),
    ({"duration_b": math.nan}, "duration_b must be"),
    ({"listen_data_a": "[1, 2]"}, "listen_data_a: a list of"),
    ({"audio_b": "../../etc/passwd"}, "leaves the data set's folder"),
    ({"audio_b": "a\0b"}, "leaves the data set's folder"), ({"audio_b": 5}, "0.json: audio_b is no text"),
    ({"feedback": 7}, "feedback is no text"), ({"prompt": "\ud83d"}, "prompt is missing or no text"),
    ({"user_pseudonym": ["x"]}, "user_pseudonym is no text"), ({"duration_a": 10**400}, "duration_a must be"),
    ({"listen_data_a": "[" * 100_000}, "listen_data_a: a list of")])
def test_bad_battles(tmp_path, change, match):
    with pytest.raises(DataError, match=match):
        list(read_votes(release(tmp_path, change), Heard()))


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="holds no vote"):
        list(read_votes(tmp_path, Heard()))
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(DataError, match="a battle is a JSON object, got list"):
        list(read_votes(tmp_path, Heard()))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_votes(tmp_path / "none.jsonl", Heard()))
