"""The REST API, in the MDM's process: routes, their schemas, authentication, problem documents."""
