from tests.pallas_kernels.projections.suite import Suite


class TestXla(Suite):
    implementation = "xla"
