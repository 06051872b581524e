from tests.pallas_kernels.norms.suite import Suite


class TestXla(Suite):
    implementation = "xla"
