from tests.pallas_kernels.vocabulary.scores.suite import Suite


class TestOnGpu(Suite):
    implementation = "xla"


class TestElsewhere(Suite):
    implementation = "xla"
    platform = "cpu"
