"""Tables, and the table of layer-wise information."""

import csv
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

import keras_randadapt as kra
from keras_randadapt import analysis
from keras_randadapt.analysis import plotting
from tests import zoo

pytestmark = pytest.mark.one_backend


def _table():
    return analysis.Table(
        {
            "site": ["a/b", "c"],
            "rank": [3, 12],
            "loss": [0.123456, 2.0],
            "values": [np.array([3.0, 1.0]), np.arange(6.0)],
        }
    )


class TestTable:
    def test_columns_and_rows(self):
        table = _table()
        assert len(table) == 2
        assert table.columns == ["site", "rank", "loss", "values"]
        np.testing.assert_array_equal(table["rank"], [3, 12])
        assert table["rank"].dtype.kind == "i"
        assert table.rows()[1]["site"] == "c"
        np.testing.assert_array_equal(table["values"][0], [3, 1])
        assert table.to_dict()["values"] == [[3, 1], [0, 1, 2, 3, 4, 5]]
        assert type(table.to_dict()["rank"][0]) is int

    def test_equal_arrays_stay_a_column(self):
        table = analysis.Table({"values": [np.zeros(2), np.ones(2)]})
        assert len(table) == 2
        np.testing.assert_array_equal(table["values"][1], [1, 1])

    def test_text(self):
        assert repr(_table()) == (
            "site  rank    loss  values\n"
            "a/b      3  0.1235  3 1\n"
            "c       12       2  0 1 2 3 ..."
        )

    def test_csv(self, tmp_path):
        path = tmp_path / "table.csv"
        _table().to_csv(path)
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0] == {
            "site": "a/b",
            "rank": "3",
            "loss": "0.123456",
            "values": "3.0 1.0",
        }
        assert len(rows) == 2

    def test_errors(self):
        with pytest.raises(ValueError, match="must be of equal length"):
            analysis.Table({"a": [1, 2], "b": [1]})
        with pytest.raises(KeyError, match="There is no column 'rnk'"):
            _table()["rnk"]

    def test_empty(self):
        table = analysis.Table({})
        assert len(table) == 0
        assert table.rows() == []

    def test_short_names(self):
        names = ["layers/block/query", "layers/block_1/query"]
        assert plotting.short_names(names) == ["block/query", "block_1/query"]
        assert plotting.short_names(["layers/block/query"]) == ["query"]
        assert plotting.short_names(["query", "value"]) == ["query", "value"]

    def test_of_many_sites_some_are_labelled(self):
        sites = [f"block_{i}/query" for i in range(100)]
        table = analysis.SiteTable({"site": sites, "rank": range(100)}, "rank")
        axis = table.plot(Figure().subplots())
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert labels[:2] == ["block_0/query", "block_3/query"]
        assert len(axis.patches) == 100


def _callback(information, sites=("block_0/query", "block_1/query", "c")):
    return types.SimpleNamespace(information=information, sites=list(sites))


class TestLayerInformation:
    VALUES = np.array([[1.0, 2.0, 5.0], [3.0, 1.0, 0.0]])

    @pytest.mark.parametrize("kind", [np.array, np.ndarray.tolist])
    def test_table(self, kind):
        table = analysis.layer_information(_callback(kind(self.VALUES)))
        assert table.columns == ["site", "estimation_1", "estimation_2"]
        assert table["estimation_2"].tolist() == [3, 1, 0]
        np.testing.assert_array_equal(table.values, self.VALUES)
        assert len(table) == 3

    def test_flows(self):
        """By hand: all at the first site, then even, then at the last."""
        values = [[4.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 5.0], [0, 0, 0]]
        callback = types.SimpleNamespace(
            sites=["a", "b", "c"], information=values
        )
        flows = analysis.layer_information(callback).flows()
        nan = float("nan")
        expected = {
            "estimation": [1, 2, 3, 4],
            "total": [4, 3, 5, 0],
            "depth": [0, 0.5, 1, nan],
            "spread": [0, np.sqrt(1 / 6), 0, nan],
            "sites": [1, 3, 1, nan],
            "moved": [nan, 2 / 3, 2 / 3, nan],
        }
        assert flows.columns == list(expected)
        for name, column in expected.items():
            np.testing.assert_allclose(flows[name], column, atol=1e-12)

    def test_shares(self):
        values = np.concatenate([self.VALUES, np.zeros((1, 3))])
        table = analysis.layer_information(_callback(values), normalize=True)
        np.testing.assert_allclose(table["estimation_1"], [1 / 8, 1 / 4, 5 / 8])
        np.testing.assert_allclose(table["estimation_3"], 0)

    def test_plot(self):
        table = analysis.layer_information(_callback(self.VALUES))
        axis = table.plot(Figure().subplots())
        image = axis.images[0].get_array()
        np.testing.assert_array_equal(image, self.VALUES.T)
        labels = [label.get_text() for label in axis.get_yticklabels()]
        assert labels == ["block_0/query", "block_1/query", "c"]
        assert axis.get_xlabel() == "estimation"

    def test_of_the_callback(self):
        """What `PACBayes` estimated in a real `fit`."""
        model, x, targets = zoo.dense()
        kra.inject(model, kra.RLoRA(4), targets)
        y = zoo.normal(8, 6, seed=1)
        callback = kra.callbacks.PACBayes(x, y, 1e-3)
        model.compile("adam", "mse")
        model.fit(x, y, epochs=3, callbacks=[callback], verbose=0)
        table = analysis.layer_information(callback)
        assert table["site"].tolist() == list(kra.sites(model))
        np.testing.assert_array_equal(table.values, callback.information)
        assert len(table.columns) == 1 + len(callback.information) > 1

    def test_errors(self):
        with pytest.raises(TypeError, match="`callback` must be a"):
            analysis.layer_information([1, 2])
        for nothing in ([], None):
            with pytest.raises(ValueError, match="no information yet"):
                analysis.layer_information(_callback(nothing))
        with pytest.raises(ValueError, match="Received: shape"):
            analysis.layer_information(_callback(self.VALUES[:, :2]))
        with pytest.raises(ValueError, match="Received: shape"):
            analysis.layer_information(_callback(self.VALUES[0]))
