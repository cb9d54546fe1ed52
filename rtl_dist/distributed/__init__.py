"""The processes of a job: how they meet, agree, stop and are watched."""
