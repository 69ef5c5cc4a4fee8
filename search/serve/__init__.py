"""Writers of the formats that engines read, and which plans each of them can hold."""
