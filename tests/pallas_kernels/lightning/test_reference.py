from tests.pallas_kernels.lightning.suite import Suite


class TestReference(Suite):
    implementation = "reference"

    def bears(self, case):
        # Its steps move whole states: one long case of each kind is enough.
        return case.length < 4000 or case.heads == 1
