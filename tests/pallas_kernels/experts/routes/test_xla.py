from tests.pallas_kernels.experts.routes.suite import Suite


class TestXla(Suite):
    implementation = "xla"
